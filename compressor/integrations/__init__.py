"""Plug-ins for programs that run models: imported by them, never by the rest of this package."""
