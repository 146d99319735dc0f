"""The machine of a run: its devices, memory and time."""
