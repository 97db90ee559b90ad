"""Around a run: its folder, what it loads and tells, memory, processes. Open it when a run stops or fills memory."""
