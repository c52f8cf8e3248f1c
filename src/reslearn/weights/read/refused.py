"""The exception for files that cannot be read safely."""


class Refused(Exception):
    """Why a file is not read, as the end of a sentence that starts with its path."""
