"""Machines that engines are measured on: how they are reached, and what runs there."""
