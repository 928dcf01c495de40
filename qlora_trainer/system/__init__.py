"""What every room stands on.

`disk` brings files and folders to the disk whole or not at all, `redact` masks what leaves the process as
text, `terminal` and `streams` write to the screen, `quiet` stills libraries, `cache` is the user's cache,
`processes` starts and shields workers, `untrusted` reads documents that anybody may have made.
"""
