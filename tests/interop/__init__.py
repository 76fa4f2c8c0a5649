"""The gateway between every client and every upstream: what is seen, and who works with whom."""
