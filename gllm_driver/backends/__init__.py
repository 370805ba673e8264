"""Backends: one protocol (base), one implementation per kind of device, and the choice among them (select)."""
