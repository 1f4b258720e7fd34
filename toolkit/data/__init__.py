"""Data sets: labelled image folders, and one drawn on the spot."""
