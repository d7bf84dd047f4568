"""One image in a file."""

import errno
import os

from PIL import Image, ImageOps, UnidentifiedImageError

from attnzoo.files import open_file


def read_image_file(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """An image, upright.

    Args:
        path: Any image that Pillow reads.
        mode: Pillow's, such as `RGB` and `L`.

    Raises:
        OSError: what `strerror` says: the system's reason, or that it is no regular file or no image.
    """
    with open_file(path) as file:
        try:
            with Image.open(file) as image:
                return ImageOps.exif_transpose(image).convert(mode)
        except Exception as error:  # Pillow's readers raise whatever they stumble over in a damaged file
            why = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error)[:100]})"
            raise OSError(errno.EINVAL, f"it is no image that can be read{why}", os.fspath(path)) from error
