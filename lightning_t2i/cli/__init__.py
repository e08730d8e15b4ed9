"""The command line: verbs, configs with `base:`, run folders, errors for users.

`main` is all that train.py imports; it answers --help, --version and list without torch.
"""
