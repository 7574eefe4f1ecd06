"""The packed format of this project: its index, its modules, reading it from a file or from memory, and unpacking it."""
