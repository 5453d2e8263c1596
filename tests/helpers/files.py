"""Compare files before and after a command."""


def snapshot(path):
    """Content, size and time of modification. The access time is left out: reading changes it on some file systems."""
    about = path.stat()
    return path.read_bytes(), about.st_size, about.st_mtime_ns
