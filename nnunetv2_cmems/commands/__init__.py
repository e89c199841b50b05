"""The console command ``nnUNetv2_cmems``: one module for each subcommand."""
