from typing import NamedTuple


class Mutation(NamedTuple):
    op: str  # the file of the kernel, and check_<op>.py
    what: str
    old: str  # replaced wherever it stands in the file
    new: str
    caught_by: str
    file: str = ""  # where it stands, if in a module that the kernel's imports from
