"""What people look at: the console and the live view of a run, its report, the token viewer, the comparison of two."""
