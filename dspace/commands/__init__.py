"""The commands of the command line; each file is one group. Nothing heavy is imported before a command runs."""
