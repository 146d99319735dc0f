"""What kind of processor a result is of: its file says so in its name, as results of several kinds are kept."""

from besa.kernels import sparse_native, tiles_native


def ending() -> str:
    """Of the file's name: `-amx` with a matrix unit, `-avx2` with that alone, none with AVX-512."""
    if tiles_native.MATRIX in tiles_native.paths():
        return "-amx"
    return "-avx2" if sparse_native.paths()[:1] == ["avx2"] else ""
