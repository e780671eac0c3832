"""What every other room stands on: settings and profiles, errors, units, text and tables, files written whole or not at all."""
