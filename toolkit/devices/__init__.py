"""Machines that engines are measured on: what they are called, how they are reached, what they tell."""
