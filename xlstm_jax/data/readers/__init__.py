"""How files are cut into documents: a reader a file format.

`table` holds a row per format: suffixes, first bytes, and its reader, or what
to do with a file that nothing here reads.
"""
