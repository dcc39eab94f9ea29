"""Hydra's configuration groups, as package data: `pkg://t2i_conf`."""
