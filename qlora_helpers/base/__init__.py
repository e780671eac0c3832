"""What every other room builds on: settings and profiles, errors, units, text and tables, files that are written atomically."""
