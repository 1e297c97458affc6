"""Classes of the first edition of streets."""

from segadapt.trainables.core.data.batch import ClassList

CLASSES_V1 = ClassList(
    names=("road", "sidewalk", "building", "pole", "vegetation", "sky", "person", "car"),
    colors=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (153, 153, 153),
        (107, 142, 35),
        (70, 130, 180),
        (220, 20, 60),
        (0, 0, 142),
    ),
)
"""Eight Cityscapes classes in the order of their train ids, with the Cityscapes colours."""

ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR = range(len(CLASSES_V1))
