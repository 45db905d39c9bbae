"""Files on disk that people and later versions read: profiles and journals."""
