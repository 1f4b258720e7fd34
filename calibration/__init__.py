"""INT8: which images calibrate, what stays float, and one quantiser for each engine."""
