"""Bytes and seconds by arithmetic: the fastest settings that fit, fixes, predictions beside measurements, out of memory."""
