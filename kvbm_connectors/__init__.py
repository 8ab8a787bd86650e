"""Plug-ins for engines: each subpackage imports its own engine and `kvbm_core`, no other."""
