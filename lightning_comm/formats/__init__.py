"""File formats that people and later versions read: profiles and journals."""
