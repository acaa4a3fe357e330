"""Private interfaces of libraries, one file per library, with the versions they are known for.

If a new version of a library changes one of them, it is fixed here and nowhere else.
"""
