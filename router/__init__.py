"""The front door: places each request on two pools and sees its stream to the end."""
