"""Effects: where blocks are kept outside the process's memory."""
