"""The small package that all lessons share: everything that is not the lesson itself."""
