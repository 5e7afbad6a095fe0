"""Other people's DQNs, run at the settings of this one."""
