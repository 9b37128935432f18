"""Data sets in one row format (`schema`): Scenes, the procedural benchmark."""
