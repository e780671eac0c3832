"""Bytes and seconds by arithmetic: the fastest settings that fit, fixes, predicted beside measured, out of memory."""
