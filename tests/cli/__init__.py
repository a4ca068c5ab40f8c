"""Every command in a process of its own: its exit status and what it says."""
