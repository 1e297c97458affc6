"""Settings of online self-training, which any method may be trained with."""

from dataclasses import dataclass
from typing import Literal

from segadapt.trainables.core.validation import check

Mask = Literal["none", "block", "token"]
TeacherNorm = Literal["batch", "running", "average"]


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Online self-training beside a method's own losses: a teacher labels target images anew in every step.

    Where a released code departs from its paper, the default is named "our choice" and the code's way is a setting.
    """

    enabled: bool | None = None
    """Whether these terms are added to the method's; null: in `online_self_training` alone."""
    teacher_rate: float = 1e-3
    """Share of the student, 1 minus its momentum, that the teacher takes over in a step, in the long run. DACS: 0.01;
    DAFormer, MIC, VFM-UDA: 0.001."""
    teacher_norm: TeacherNorm = "batch"
    """Batch norm of the teacher: by the batch (DACS, MIC), by the student's running statistics, or by the average of
    those (VFM-UDA)."""
    threshold: float = 0.968
    """Probability from which on a target pixel is confident. Paper: 0.968."""
    quality: Literal["image", "batch", "none"] = "image"
    """Whose share of confident pixels weighs pseudo labels; none: all weigh 1. Our choice: image. Released: batch."""
    mirrored: bool = False
    """Whether the teacher labels by the mean over an image and its mirror image. VFM-UDA: true."""
    margins: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Shares of a target image's height and width at its top, bottom, left and right whose labels weigh 0. MIC, of
    Cityscapes: 30/1024, 240/1024, 30/2048, 30/2048; VFM-UDA: 0.03, 0.25, 0.03, 0.03."""
    mix_weight: float = 1.0
    """Weight of the cross entropy on images that source pixels are pasted on; 0 costs no pass. Paper: 1."""
    classes_of: Literal["image", "batch"] = "image"
    """Where the pasted classes are drawn from. Our choice: the image's own. Released: those of the batch."""
    paste_ignored: bool = False
    """Whether pixels without label are pasted as if of one class. Our choice: no. Released: yes."""
    mean_over: Literal["all", "valid"] = "all"
    """What the sums of mixed and masked images are divided by: all pixels (released), or those with a label."""
    mask: Mask = "block"
    """What of target images is hidden: nothing, blocks of pixels (MIC), or a plain transformer's tokens (VFM-UDA)."""
    mask_weight: float = 1.0
    """Weight of the cross entropy on masked images; 0 costs no pass. Paper (MIC): 1."""
    mask_ratio: float = 0.7
    """Share that is hidden. Paper: 0.7."""
    mask_block: float = 0.0625
    """Side of a block, as a share of the image's shorter side. Paper (MIC): 1/16, 64 of 1024 pixels."""
    mask_augment: bool = True
    """Whether masked images are augmented as mixed ones are. MIC: yes, but for clear to adverse weather."""
    jitter: float = 0.2
    """Strength of brightness, contrast and saturation in mixed and masked images. Paper: 0.2."""
    hue: float = 0.2
    """Hue is shifted by U(-hue, hue) turns. Paper: 0.2."""
    jitter_chance: float = 0.8
    """Probability of `jitter` and `hue`. Paper: 0.8."""
    blur: float = 1.15
    """Gaussian blur with sigma U(0.15, blur) pixels. Paper: 1.15."""
    blur_chance: float = 0.5
    """Probability of `blur`. Paper: 0.5."""
    augment_of: Literal["batch", "image"] = "batch"
    """Whether a batch's images are jittered and blurred all or none (DACS), or each by itself (VFM-UDA)."""
    feature_distance: float = 0.0
    """Weight of the distance of things' features to the pretrained network's. DAFormer: 0.005; 0 for plain
    transformers, where it harms (VFM-UDA++)."""
    feature_purity: float = 0.75
    """Share of a cell's pixels that must show its class, in `feature_distance`. Paper: 0.75."""
    rare_class_temperature: float | None = None
    """Source images are drawn by class, rare ones the more often the smaller this is; null: as the method draws them.
    DAFormer: 0.01; VFM-UDA: 0.05."""
    rare_class_pixels: int | None = None
    """Pixels of the drawn class that an image must have more than; null: 3000 times the crop's area over 512x512.
    Paper: 3000."""
    crop_tries: int = 10
    """Times a source crop is drawn at most, until it shows enough of the drawn class and no class fills more than 75 %
    of it. DAFormer: 10; VFM-UDA: 20."""
    deploys: Literal["student", "teacher"] = "student"
    """Which network is evaluated and exported. Paper: student."""

    def __post_init__(self) -> None:
        shares = ("teacher_rate", "threshold", "mask_ratio", "jitter", "jitter_chance", "blur_chance", "feature_purity")
        for name in shares:
            check(0 <= getattr(self, name) <= 1, f"online.{name} must lie in [0, 1]", getattr(self, name))
        for name in ("mix_weight", "mask_weight", "feature_distance"):
            check(getattr(self, name) >= 0, f"online.{name} must not be negative", getattr(self, name))
        check(all(0 <= side < 1 for side in self.margins), "online.margins must lie in [0, 1)", self.margins)
        check(0 < self.mask_block <= 1, "online.mask_block must lie in (0, 1]", self.mask_block)
        check(0 <= self.hue <= 0.5, "online.hue must lie in [0, 0.5]", self.hue)
        check(self.blur >= 0.15, "online.blur must be at least 0.15", self.blur)
        temperature, pixels = self.rare_class_temperature, self.rare_class_pixels
        check(
            temperature is None or temperature > 0,
            "online.rare_class_temperature must be positive or null",
            temperature,
        )
        check(pixels is None or pixels >= 0, "online.rare_class_pixels must not be negative", pixels)
        check(self.crop_tries >= 1, "online.crop_tries must be at least 1", self.crop_tries)

    @property
    def mixes(self) -> bool:
        """Whether source pixels are pasted on target images."""
        return self.mix_weight > 0

    @property
    def masks(self) -> bool:
        """Whether masked target images are trained on."""
        return self.mask != "none" and self.mask_weight > 0
