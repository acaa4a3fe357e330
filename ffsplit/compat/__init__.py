"""Private interfaces of libraries, one file per library, with the versions they are known for.

Whatever a new version of a library moves is mended here and nowhere else.
"""
