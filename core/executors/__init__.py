"""Executors: one worker or many, behind the face of one."""
