"""Attention whose cost grows with n instead of n m."""
