"""How good and how fast a checkpoint is as it is served, compared with another one."""
