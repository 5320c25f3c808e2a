"""What ``make bench`` measures: vramd beside others, in the same run, on the same machine."""
