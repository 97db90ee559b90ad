"""Around a run: its folder, what it needs and tells, the machine, several processes. Open it when a run stops, waits
or fills memory."""
