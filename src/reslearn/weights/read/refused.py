"""The reason not to read a file."""


class Refused(Exception):
    """Why a file is not read, as the end of a sentence that begins with its path."""
