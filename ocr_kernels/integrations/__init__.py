"""Hooks into other libraries; each file needs the one that it is named after."""
