"""How results look in a terminal: built here, and printed by the command of the same file.

Each file imports what its results are made of only to name it: a command waits for no other's libraries.
"""
