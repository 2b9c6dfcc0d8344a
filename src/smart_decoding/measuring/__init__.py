"""What commands that measure share: prompts, the machine, paired ratios, and runs that are cut."""
