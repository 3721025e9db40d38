"""The verbs of the command line, one module a room; each imports what it calls when it is called."""
