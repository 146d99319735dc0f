"""besa inside other programs: the hook that registers it, and what each of them calls."""
