"""The methods: one file each, read from top to bottom like the paper."""
