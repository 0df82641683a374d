"""What the user asks for: settings, presets, loading."""
