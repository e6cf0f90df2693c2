"""Files and folders that lie, built by code, and the entries of l4q that must refuse them.

`catalog` lists the attacks, `bases` builds the good folders they damage, `entries` runs a command or reader on what
comes out, and `runner` does so in forked processes with bounded memory and time.
"""
