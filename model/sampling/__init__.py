"""Noise schedules, and samplers as tables of coefficients."""
