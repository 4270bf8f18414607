"""Shared by all rooms: data, networks, files, statistics, command lines."""
